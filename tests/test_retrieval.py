"""Drafts from an index of recorded chunks, the index as a file, and the drafter that switches by motion."""

import json

import numpy as np
import pytest
from contract.fakes import Scripted, build, greedy_path, toy_engine, toy_inputs, toy_parts
from test_kinematics import tokens_of

from vla_spec import cli
from vla_spec.acceptance.greedy import GreedyRule
from vla_spec.adapters import toy
from vla_spec.decoder import SpeculativeDecoder
from vla_spec.drafters._retrieval_index import RetrievalIndex
from vla_spec.drafters.hybrid import HybridDrafter
from vla_spec.drafters.hybrid import Options as HybridOptions
from vla_spec.drafters.retrieval import FILE_NAME, Options, RetrievalDrafter
from vla_spec.errors import BadConfig, BadModel
from vla_spec.interfaces import ChunkHistory
from vla_spec.kinematics import Motion
from vla_spec.types import EMPTY_DRAFT, Draft, Plan

D, T = 6, 32
FOUR = Plan(4, 4)


def index_of(features, tokens, key_size=4, model_hash="abc"):
    return RetrievalIndex.from_features(
        np.asarray(features, np.float32), np.asarray(tokens, np.int32), key_size, model_hash, {"from": "a test"}
    )


@pytest.fixture
def index():
    rng = np.random.default_rng(0)
    return index_of(rng.normal(size=(40, D)), rng.integers(0, 256, (40, T)))


# ---- the index ------------------------------------------------------------------------------------------------


def test_an_entry_is_its_own_nearest_neighbour():
    rng = np.random.default_rng(1)
    features = rng.normal(size=(200, D)).astype(np.float32)
    index = index_of(features, np.zeros((200, T)), key_size=D)
    for i in (0, 17, 199):
        found, similarity = index.nearest(features[i], 5)
        assert found[0] == i
        assert similarity[0] == pytest.approx(1.0, abs=1e-5)
        assert (np.diff(similarity) <= 0).all()
    expected = np.argsort(-(index.keys @ index.key(features[3])))[:5]
    np.testing.assert_array_equal(index.nearest(features[3], 5)[0], expected)


def test_more_neighbours_than_entries_are_all_entries():
    index = index_of(np.eye(3, D), np.zeros((3, T)), key_size=3)
    assert sorted(index.nearest(np.ones(D, np.float32), 8)[0].tolist()) == [0, 1, 2]


def test_the_projection_keeps_what_varies():
    """All variation lies in two of six numbers: two components are enough to tell entries apart."""
    rng = np.random.default_rng(2)
    features = np.zeros((60, D), np.float32)
    features[:, [1, 4]] = rng.normal(size=(60, 2))
    index = index_of(features, np.zeros((60, T)), key_size=2)
    assert index.projection.shape == (D, 2)
    assert np.abs(index.projection[[0, 2, 3, 5]]).max() < 1e-5
    np.testing.assert_allclose(np.linalg.norm(index.keys, axis=1), 1, atol=1e-5)


def test_a_saved_index_comes_back(index, tmp_path):
    path = tmp_path / "deep" / "index.npz"
    index.save(path)
    again = RetrievalIndex.load(path)
    np.testing.assert_array_equal(again.tokens, index.tokens)
    np.testing.assert_allclose(again.keys, index.keys, atol=1e-3)  # half precision
    assert (again.model_hash, again.about) == ("abc", {"from": "a test"})
    assert [file.name for file in path.parent.iterdir()] == ["index.npz"]
    with np.load(path, allow_pickle=False) as file:
        assert {name: file[name].dtype.kind for name in file.files}["tokens"] == "u"


@pytest.mark.parametrize("damage", ["missing", "text", "cut", "no_tokens", "few_tokens", "nan"])
def test_a_broken_index_is_refused_in_one_sentence(index, tmp_path, damage):
    path = tmp_path / "index.npz"
    index.save(path)
    if damage == "missing":
        path.unlink()
    elif damage == "text":
        path.write_text("not an archive")
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:200])
    else:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
        if damage == "no_tokens":
            del arrays["tokens"]
        elif damage == "few_tokens":
            arrays["tokens"] = arrays["tokens"][:3]
        else:
            arrays["mean"] = np.full_like(arrays["mean"], np.nan)
        np.savez(path, **arrays)
    with pytest.raises(BadModel, match=r"index\.npz: .*`vla-spec calibrate retrieval --out FILE` writes one"):
        RetrievalIndex.load(path)


# ---- the drafter ----------------------------------------------------------------------------------------------


def features_for(row, prefix):
    """As an engine has them: one prompt row, then one per committed token."""
    return np.concatenate((np.asarray(row, np.float32)[None], np.full((len(prefix) - 1, D), 9, np.float32)))


CHUNKS = np.array([np.arange(T), np.arange(T) + 100, [*range(8), *range(200, 224)]], np.int32)


def drafter(**options):
    return RetrievalDrafter(Options(**options), index_of(np.eye(3, D), CHUNKS, key_size=3), 4)


def drafted(made, row, prefix, plan=FOUR):
    made.begin({}, None)
    prefix = np.array(prefix, np.int32)
    return made.propose(prefix, plan, features_for(row, prefix))


def test_the_most_similar_chunk_is_continued():
    assert drafted(drafter(), np.eye(3, D)[1], [7]).tokens.tolist() == [101, 102, 103, 104]
    assert drafted(drafter(), np.eye(3, D)[0], [7]).tokens.tolist() == [1, 2, 3, 4]
    assert drafted(drafter(neighbours=1), np.eye(3, D)[0], [0, 1, 2], Plan(9, 2)).tokens.tolist() == [3, 4]


def test_among_the_candidates_the_one_that_agrees_with_the_newest_step_wins():
    made = drafter(min_similarity=-1.0)
    assert drafted(made, np.eye(3, D)[0], [0, 1, 104, 105, 106, 107]).tokens.tolist() == [106, 107, 108, 109]


def test_what_is_unlike_anything_is_not_drafted():
    made = drafter(min_similarity=0.9)
    assert drafted(made, np.eye(3, D)[0], [7]).tokens.tolist() == [1, 2, 3, 4]
    far = drafted(made, [1.0, 1.0, 0.9, 0, 0, 0], [7])
    assert far.tokens.tolist() == []
    assert made.similarity < 0.9


def test_candidates_merge_into_a_tree_with_shared_beginnings():
    made = drafter(min_similarity=-1.0)
    draft = drafted(made, np.eye(3, D)[0], [0, 1, 2, 3, 4, 5], Plan(8, 4, 2))
    assert draft.tokens.tolist() == [6, 7, 8, 9, 200, 201, 106, 107]
    assert draft.parents.tolist() == [-1, 0, 1, 2, 1, 4, -1, 6]


def test_without_features_or_behind_the_end_nothing_is_drafted():
    made = drafter()
    made.begin({}, None)
    assert made.propose(np.array([1], np.int32), Plan(4, 4), None) == EMPTY_DRAFT
    assert len(drafted(made, np.eye(3, D)[0], list(range(T))).tokens) == 0


def test_each_chunk_is_looked_up_once():
    made = drafter()
    made.begin({}, None)
    prefix = np.array([7], np.int32)
    assert made.propose(prefix, Plan(2, 2), features_for(np.eye(3, D)[1], prefix)).tokens.tolist() == [101, 102]
    prefix = np.array([7, 8], np.int32)
    assert made.propose(prefix, Plan(2, 2), features_for(np.eye(3, D)[0], prefix)).tokens.tolist() == [102, 103]


def test_an_index_of_another_model_or_shape_is_refused(tmp_path):
    parts = toy_parts()
    engine = toy_engine(parts)
    parts = toy_parts(target=engine)
    index_of(np.eye(3, D), CHUNKS, model_hash="0" * 64).save(tmp_path / "other.npz")
    with pytest.raises(BadModel, match=rf"made with model 000000000000, the one .* {engine.info.model_hash[:12]}"):
        build("drafter", "retrieval", parts, index=tmp_path / "other.npz")
    index_of(np.eye(3, D), CHUNKS[:, :8]).save(tmp_path / "short.npz")
    with pytest.raises(BadModel, match="chunks of 8 tokens"):
        build("drafter", "retrieval", parts, index=tmp_path / "short.npz")
    with pytest.raises(BadModel, match=r"set drafter\.index"):
        build("drafter", "retrieval", parts)


def test_it_retrieves_what_the_same_observation_gave_before(tmp_path):
    """Index the toy target's own chunks by its features; an observation seen before is decoded in two forwards."""
    parts = toy_parts()
    engine = toy_engine(parts)
    features, chunks = [], []
    for step in range(0, 40, 4):
        chunks.append(greedy_path(engine, toy_inputs(step), T))
        engine.prefill(toy_inputs(step))
        features.append(engine.features[-1].copy())
    made = index_of(features, chunks, key_size=len(features[0]), model_hash=engine.info.model_hash)
    made.save(tmp_path / FILE_NAME)
    parts = toy_parts(target=engine, model_dir=tmp_path)
    retrieval = build("drafter", "retrieval", parts)
    controller = build("controller", "fixed", parts, gamma=31)
    decoder = SpeculativeDecoder(engine, retrieval, GreedyRule(), controller, T, lambda: 0, np.random.default_rng(0))
    for step in (0, 16, 36):
        decoded = decoder.decode(toy_inputs(step), 1 << 60)
        np.testing.assert_array_equal(decoded.tokens, greedy_path(toy_engine(parts), toy_inputs(step), T))
        assert len(decoded.rounds) == 2


# ---- building it ----------------------------------------------------------------------------------------------


def demonstrations(folder, adapter, task="push", frames=3):
    rng = np.random.default_rng(0)
    (folder / task).mkdir(parents=True)
    example = adapter.example()
    np.savez(
        folder / task / "0.npz", images=rng.integers(0, 256, (frames, *example.images.shape), np.uint8),
        steps=np.arange(0, 2 * frames, 2, dtype=np.int32), state=np.tile(example.state, (2 * frames + 8, 1)),
        labels=rng.uniform(-1, 1, (2 * frames + 8, 4)).astype(np.float32),
    )  # fmt: skip
    no_pictures = np.zeros((0, *example.images.shape), np.uint8)  # a failed episode is kept without them
    nothing = np.zeros((9, 4))
    np.savez(folder / task / "1.npz", images=no_pictures, steps=np.zeros(0, np.int32), state=nothing, labels=nothing)


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


@pytest.mark.parametrize("chunks", ["target", "demonstration"])
def test_an_index_is_built_from_demonstrations(capsys, tmp_path, chunks):
    adapter = toy.build(toy.Options())
    demonstrations(tmp_path / "data", adapter)
    out = tmp_path / "index.npz"
    code, text, err = run(
        capsys, "calibrate", "retrieval", "--data", str(tmp_path / "data"), "--episodes", "2", "--every", "1",
        "--key-size", "2", "--chunks", chunks, "--out", str(out), "--engine", "toy", "--mode", "autoregressive",
    )  # fmt: skip
    assert code == 0, err
    assert text.startswith("3 entries of 2 numbers")
    index = RetrievalIndex.load(out)
    assert index.about["entries_by_task"] == {"push": 3}
    assert index.about["command"].startswith("vla-spec calibrate retrieval")
    with np.load(tmp_path / "data" / "push" / "0.npz") as file:
        labels = file["labels"]
    first = adapter.tokenizer.encode(labels[:8])
    assert (index.tokens[0].tolist() == first.tolist()) == (chunks == "demonstration")


def test_a_bad_request_for_an_index_is_one_sentence(capsys, tmp_path):
    for arguments, message in (
        (["--data", str(tmp_path), "--out", "x.npz"], "no demonstrations"),
        (["--chunks", "expert", "--out", "x.npz"], "valid: target, demonstration"),
        (["--out", "x.json"], "valid: a file name that ends in .npz"),
        (["--seed-start", "9999", "--out", "x.npz"], "kept for evaluation"),
    ):
        code, _, err = run(capsys, "calibrate", "retrieval", *arguments)
        assert code == 2
        assert message in " ".join(err.split())


# ---- hybrid ---------------------------------------------------------------------------------------------------


def hybrid(**options):
    parts = toy_parts()
    fast = Scripted(lambda prefix, plan, history: Draft.chain(np.array([1], np.int32)))
    slow = Scripted(lambda prefix, plan, history: Draft.chain(np.array([2], np.int32)))
    options = HybridOptions(**{"radius": 0.02, "length": 0.05, **options})
    return HybridDrafter(options, fast, slow, Motion(parts.domain, parts.tokenizer), 4)


def chosen(made, history):
    made.begin({}, history)
    return made.propose(np.array([0], np.int32), Plan(1, 1), None).tokens.tolist()


def test_fast_and_straight_motions_are_drafted_by_the_one_slow_ones_by_the_other():
    made = hybrid()
    fast = ChunkHistory(tokens_of([[0.9, 0.3, 0]] * 8), 24)
    slow = ChunkHistory(tokens_of([[0.02, 0, 0]] * 8), 32)
    assert chosen(made, None) == [2]
    assert chosen(made, fast) == [1]
    assert chosen(made, slow) == [1]  # the window still holds the fast steps
    assert chosen(made, ChunkHistory(tokens_of([[0.01, 0, 0]] * 8), 32)) == [2]
    assert chosen(made, None) == [2]
    assert (made.num_fast, made.num_slow) == (2, 3)


def test_the_switching_value_decides():
    fast = ChunkHistory(tokens_of([[0.9, 0.3, 0]] * 8), 24)
    assert chosen(hybrid(switch_at=1.0), fast) == [2]
    assert chosen(hybrid(switch_at=0.0), fast) == [1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fast": "hybrid"}, "fast must be another drafter"),
        ({"switch_at": 2.0}, r"switch_at must be in \[0, 1\]"),
        ({"radius": 0.0}, "radius must be more than 0"),
    ],
)
def test_hybrid_options_that_can_not_be_right(options, message):
    with pytest.raises(BadConfig, match=message):
        HybridOptions(**options)


def test_the_about_of_an_index_is_plain_json(index, tmp_path):
    index.save(tmp_path / "i.npz")
    with np.load(tmp_path / "i.npz", allow_pickle=False) as file:
        assert json.loads(str(file["about"])) == {"from": "a test"}
