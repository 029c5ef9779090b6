"""OpenVLA's adapter: pictures, prompts and actions as the published processor and tokenizer make them."""

import json

import numpy as np
import pytest

tokenizers = pytest.importorskip("tokenizers", reason="needs the extra [openvla]")
pytest.importorskip("PIL", reason="needs the extra [openvla]")

from vla_spec import plugins  # noqa: E402
from vla_spec.adapters._square_pictures import centre_crop, square  # noqa: E402
from vla_spec.adapters.openvla import Options, load  # noqa: E402
from vla_spec.engines._model_files import adapter_of  # noqa: E402
from vla_spec.errors import BadConfig, BadModel, BadObservation, BadToken, UnknownOption  # noqa: E402
from vla_spec.plugins import Parts  # noqa: E402
from vla_spec.types import Observation  # noqa: E402

STATISTICS = {
    "bridge_orig": {
        "q01": [-0.03, -0.04, -0.05, -0.1, -0.2, -0.3, 0.0],
        "q99": [0.05, 0.04, 0.03, 0.2, 0.1, 0.4, 1.0],
        "mask": [True] * 6 + [False],
    },
    "still": {"q01": [0.0, -1.0], "q99": [0.0, 1.0], "mask": [True, True]},
}
PART = {
    "timm_id": "v",
    "image_size": 28,
    "mean": [0.5] * 3,
    "std": [0.5] * 3,
    "interpolation": "bicubic",
    "overrides": [],
}


def write_words(path):
    """One token per character, the begin-of-sequence token first, as Llama's tokenizer marks spaces."""
    tk = tokenizers
    words = ["<unk>", "<s>", "\u2581", *(chr(i) for i in range(33, 127)), "\n"]
    tokenizer = tk.Tokenizer(tk.models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<unk>"))
    tokenizer.normalizer = tk.normalizers.Replace(" ", "\u2581")
    tokenizer.post_processor = tk.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(path))
    return tokenizer


def write_folder(folder, **changes):
    policy = {
        "adapter": "openvla", "vision": [PART, PART], "resize": "resize-naive",
        "prompt": "In: What action should the robot take to {instruction}?\nOut:", "max_words": 80, "bos_token": 1,
        "empty_token": 2, "num_bins": 256, "first_token": 31744, "statistics": STATISTICS,
        "unnorm_key": "bridge_orig", "center_crop": False,
    } | changes  # fmt: skip
    (folder / "policy.json").write_text(json.dumps(policy))
    write_words(folder / "tokenizer.json")
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def see(rng, *shape, words="open it"):
    return Observation(rng.integers(0, 256, shape).astype(np.uint8), np.zeros(0, np.float32), words, 0, 0)


def quantile_bins(**statistics):
    plugin = plugins.load("tokenizer", "quantile_bins")
    return plugin.build(plugin.options(**{k: tuple(v) for k, v in statistics.items()}), None)


def test_tokens_are_decoded_by_the_published_arithmetic(rng):
    stats, vocab = STATISTICS["bridge_orig"], 32000
    tokenizer = quantile_bins(**stats)
    tokens = rng.integers(0, 256, 70).astype(np.int32)
    tokens[:2] = 0, 255
    ids = 31744 + tokens
    bins = np.linspace(-1, 1, 256)
    centres = (bins[:-1] + bins[1:]) / 2
    normalised = centres[np.clip(vocab - ids - 1, 0, 254)].reshape(10, 7)
    low, high = np.array(stats["q01"]), np.array(stats["q99"])
    wanted = np.where(stats["mask"], 0.5 * (normalised + 1) * (high - low) + low, normalised)
    np.testing.assert_allclose(tokenizer.decode(tokens), wanted, rtol=0, atol=1e-7)


def test_actions_are_encoded_by_the_published_bins_but_for_the_highest_interval(rng):
    tokenizer = quantile_bins(q01=[-1.0], q99=[1.0], mask=[True])
    values = np.concatenate((rng.uniform(-1.2, 1.2, 500), [-1.0, 1.0, 0.0]))
    wanted = 256 - np.digitize(np.clip(values, -1, 1), np.linspace(-1, 1, 256))
    wanted[wanted == 1] = 0
    np.testing.assert_array_equal(tokenizer.encode(values[:, None].astype(np.float32)), wanted)
    assert tokenizer.encode(np.ones((1, 1), np.float32)) == 0


def test_the_two_highest_tokens_mean_the_same():
    tokenizer = quantile_bins(**STATISTICS["bridge_orig"])
    position = np.zeros(3, np.int32)
    found = tokenizer.distance(np.array([0, 0, 1], np.int32), np.array([1, 2, 2], np.int32), position)
    np.testing.assert_allclose(found, [0, 0.08 / 255, 0.08 / 255], rtol=1e-6)


def test_a_degree_of_freedom_that_never_moved_stays_where_it_was(rng):
    tokenizer = quantile_bins(**STATISTICS["still"])
    actions = tokenizer.decode(rng.integers(0, 256, 20).astype(np.int32))
    assert not actions[:, 0].any()
    again = tokenizer.encode(actions)
    np.testing.assert_array_equal(tokenizer.decode(again), actions)


@pytest.mark.parametrize(
    ("statistics", "words"),
    [
        ({"q01": [0.0], "q99": [-1.0], "mask": [True]}, "q01 <= q99"),
        ({"q01": [0.0], "q99": [1.0, 2.0], "mask": [True]}, "A numbers each"),
        ({"q01": [np.nan], "q99": [1.0], "mask": [True]}, "finite"),
    ],
)
def test_impossible_statistics_are_refused(statistics, words):
    with pytest.raises(BadConfig, match=words):
        quantile_bins(**statistics)


def test_bad_actions_are_named():
    tokenizer = quantile_bins(**STATISTICS["still"])
    with pytest.raises(BadObservation, match="NaN"):
        tokenizer.encode(np.full((1, 2), np.nan, np.float32))
    with pytest.raises(BadObservation, match=r"\[H, 2\]"):
        tokenizer.encode(np.zeros((1, 3), np.float32))


def test_the_prompt_is_lower_case_and_ends_with_the_empty_word(folder, rng):
    words = load(folder).encode(see(rng, 1, 30, 30, 3, words="Open IT"))["words"]
    text = "In: What action should the robot take to open it?\nOut:"
    wanted = [1, *write_words(folder / "again.json").encode(text, add_special_tokens=False).ids, 2]
    np.testing.assert_array_equal(words, [wanted])
    assert words.dtype == np.int64


def test_what_no_prompt_can_be_made_of_is_refused(folder, rng):
    adapter = load(folder)
    for words, message in (("", "empty"), ("   ", "empty"), ("open " * 20, "at most 80"), (3, "a sentence")):
        with pytest.raises(BadObservation, match=message):
            adapter.encode(see(rng, 1, 30, 30, 3, words=words))


@pytest.mark.parametrize(
    "images",
    [np.zeros((1, 30, 30, 3), np.float32), np.zeros((30, 30, 3), np.uint8), np.zeros((0, 30, 30, 3), np.uint8),
     np.zeros((1, 30, 30, 4), np.uint8), np.zeros((1, 0, 30, 3), np.uint8), None],
)  # fmt: skip
def test_bad_pictures_are_named(folder, images):
    with pytest.raises(BadObservation, match="images"):
        load(folder).encode(Observation(images, np.zeros(0, np.float32), "open it", 0, 0))


def test_the_domain_is_one_action_in_its_units(folder):
    adapter = load(folder)
    domain = adapter.domain
    assert (domain.vocab_size, domain.num_tokens, domain.tokens_per_step) == (256, 7, 7)
    assert domain.group.tolist() == [0, 0, 0, 1, 1, 1, 2]
    assert domain.never_relaxed.tolist() == [False] * 6 + [True]
    low, high = (np.array(STATISTICS["bridge_orig"][k]) for k in ("q01", "q99"))
    np.testing.assert_allclose(domain.unit_per_bin[:6], (high - low)[:6] / 255, rtol=1e-5)
    with pytest.raises(BadToken, match="id 256 at position 1"):
        adapter.decode(np.array([0, 256], np.int32))
    assert adapter.encode(adapter.example()).keys() == {"images", "words"}


def test_the_data_set_is_chosen_or_asked_for(tmp_path):
    write_folder(tmp_path, unnorm_key=None)
    with pytest.raises(BadConfig, match="set unnorm_key to one of bridge_orig, still"):
        load(tmp_path)
    with pytest.raises(UnknownOption, match="no unnorm_key named 'bridge'; have bridge_orig, still; did you mean"):
        load(tmp_path, Options(unnorm_key="bridge"))
    assert load(tmp_path, Options(unnorm_key="still")).domain.num_tokens == 2


def test_broken_folders_are_refused(tmp_path):
    with pytest.raises(BadModel, match="no such file"):
        load(tmp_path)
    write_folder(tmp_path, surplus=1)
    with pytest.raises(BadModel, match=r"unknown keys \['surplus'\]"):
        load(tmp_path)
    write_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(BadModel, match="not a tokenizer"):
        load(tmp_path)


def test_a_folder_says_whose_it_is(folder, tmp_path):
    assert adapter_of(folder) == "openvla"
    plugin = plugins.load("adapter", "openvla")
    assert plugin.build(plugin.options(camera=1), Parts(None, None, model_dir=folder)).domain.num_tokens == 7
    (folder / "policy.json").write_text("{}")
    assert adapter_of(folder) == "vla"
    assert adapter_of(folder / "nothing") == "vla"


def test_the_camera_and_the_crop_are_options(folder, rng):
    seen = see(rng, 2, 224, 224, 3)
    first, second = (load(folder, Options(camera=i)).encode(seen)["images"] for i in (0, 1))
    np.testing.assert_array_equal(second[0], square(seen.images[1], 28, "resize-naive", "bicubic", (0, 0, 0)))
    assert not np.array_equal(first, second)
    cropped = load(folder, Options(center_crop=True)).encode(seen)["images"]
    wanted = square(centre_crop(seen.images[0], 0.9), 28, "resize-naive", "bicubic", (0, 0, 0))
    np.testing.assert_array_equal(cropped[0], wanted)


@pytest.mark.parametrize("strategy", ["resize-naive", "resize-crop", "letterbox"])
@pytest.mark.parametrize(("height", "width"), [(224, 224), (256, 256), (480, 640), (641, 479), (100, 333), (60, 80)])
def test_pictures_are_the_processors(rng, strategy, height, width):
    pytest.importorskip("torch", reason="needs the extra [openvla]")
    pytest.importorskip("vla_spec.engines.nets.openvla.timm_models").load_timm()
    from PIL import Image
    from torchvision.transforms import functional

    picture = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
    fill = (127, 120, 103)
    image = Image.fromarray(picture)
    if strategy == "letterbox":
        x, y = (int((max(height, width) - n) / 2) for n in (width, height))
        image = functional.pad(image, (x, y, x, y), fill=fill, padding_mode="constant")
    size = [224, 224] if strategy == "resize-naive" else 224
    for kind in ("bicubic", "bilinear", "lanczos"):
        mode = functional.InterpolationMode(kind)
        wanted = functional.center_crop(functional.resize(image, size, mode, antialias=True), [224, 224])
        np.testing.assert_array_equal(square(picture, 224, strategy, kind, fill), np.asarray(wanted))


@pytest.mark.parametrize(("height", "width"), [(224, 224), (256, 256), (480, 640)])
def test_the_crop_is_tensorflows(rng, height, width):
    """Its definition: sample i lies at the box's first corner plus i steps between the corners' pixel centres."""
    torch = pytest.importorskip("torch", reason="needs the extra [openvla]")
    picture = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
    side = np.sqrt(0.9)
    at = torch.linspace(-side, side, 224, dtype=torch.float64)  # corners at -1 and 1 are the centres of corner pixels
    grid = torch.stack(torch.meshgrid(at, at, indexing="ij"), -1).flip(-1)[None]
    values = torch.from_numpy(picture / 255).permute(2, 0, 1)[None]
    exact = torch.nn.functional.grid_sample(values, grid, align_corners=True)[0].permute(1, 2, 0).numpy() * 255.5
    found = centre_crop(picture, 0.9)
    is_close_call = np.abs(exact - np.round(exact)) < 0.03  # noise, and positions in single precision
    np.testing.assert_array_equal(found[~is_close_call], np.floor(exact[~is_close_call]).astype(np.uint8))
    assert is_close_call.mean() < 0.1
