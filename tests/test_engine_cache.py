"""The engine cache: a key for everything that matters, engines whole or not there, nothing wrong ever loaded."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vla_spec.engines import cache
from vla_spec.engines.cache import Identity, Plan, Wanted
from vla_spec.errors import BadEngine

pytest.importorskip("filelock", reason="needs the extra [tensorrt-rtx]")

MODEL = Path(__file__).parents[1] / "models" / "metaworld"
SUMMARY = {"num_layers": 3, "precisions": {"MATRIX_MULTIPLY": {"fp16": 1}}}
PLANS = {"prompt": b"prompt plan" * 100, "decoder": bytes(range(256)) * 40}
posix = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX")


def identity(**changes):
    values = {
        "files": {"engine.json": "a" * 64, "target.safetensors": "b" * 64, "decoder.onnx": "c" * 64},
        "precision": "fp16",
        "tiers": (1, 8, 32),
        "profiles": {"decoder": [{"k": [1, 1, 1]}, {"k": [8, 8, 8]}, {"k": [32, 32, 32]}], "prompt": [{}]},
        "quantisation": "d" * 64,
        "library": {"name": "tensorrt-rtx", "version": "1.7.1.116"},
        "device": {"sm": [86, 89]},
        "options": {"workspace_bytes": None, "optimization_level": 3, "detailed": True},
        "code": "e" * 64,
    }
    return Identity(**(values | changes))


def plans(contents=PLANS, log=None):
    def build():
        for name, content in contents.items():
            if log is not None:
                log.append(name)
            yield name, Plan(content, 0.25, False, SUMMARY)

    return build


def must_not_build():
    raise AssertionError("built although it was there")
    yield


def put(folder, **changes):
    return cache.get_or_build(identity(**changes), plans(), folder)


def visible(folder):
    """Everything in the cache but the locks, which stay."""
    return sorted(path.name for path in folder.iterdir() if path.name != ".locks")


# --- the key ---------------------------------------------------------------------------------------------------------


def leaves(value, path=()):
    """Every value in a tree of plain values, with its place."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from leaves(inner, (*path, i))
    else:
        yield path, value


def changed(tree, path, value):
    out = json.loads(json.dumps(tree))
    place = out
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    return out


TREE = identity().to_json()
LEAVES = [(path, value) for path, value in leaves(TREE) if path != ("format",)]


@given(leaf=st.sampled_from(LEAVES), position=st.integers(0, 200), character=st.characters(codec="ascii"))
def test_any_single_changed_byte_is_another_key(leaf, position, character):
    path, value = leaf
    if isinstance(value, str):
        i = position % len(value)
        other = value[:i] + character + value[i + 1 :]
    elif value is None or isinstance(value, bool):
        other = not value
    else:
        other = value ^ (1 << position % 8)
    if other != value:
        assert Identity.from_json(changed(TREE, path, other)).key != identity().key


@given(leaf=st.sampled_from(LEAVES))
def test_a_value_that_is_left_out_or_of_another_type_is_another_key(leaf):
    path, value = leaf
    assert Identity.from_json(changed(TREE, path, f"{value}?")).key != identity().key
    assert Identity.from_json(changed(TREE, path, [value])).key != identity().key


def test_equal_identities_have_equal_keys_in_whatever_order_they_were_written():
    shuffled = dict(reversed(list(identity().files.items())))
    assert identity(files=shuffled).key == identity().key
    assert Identity.from_json(json.loads(json.dumps(TREE))).key == identity().key


@pytest.mark.parametrize("name", ["decoder.onnx", "target.safetensors", "block_head.safetensors", "engine.json"])
def test_a_changed_byte_of_a_model_file_is_another_hash(name, tmp_path):
    model = shutil.copytree(MODEL, tmp_path / "model")
    graphs = ("prompt", "decoder", "commit", "block_head")
    before = cache.hash_model(model, graphs)
    content = bytearray((model / name).read_bytes())
    content[len(content) // 2] ^= 1
    (model / name).write_bytes(bytes(content))
    if name == "engine.json":  # may be unreadable now, its hash is not
        assert cache.hash_file(model / name) != before[name]
        return
    after = cache.hash_model(model, graphs)
    assert [key for key in before if before[key] != after[key]] == [name]


def test_a_changed_source_of_the_builder_is_another_key(tmp_path):
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text("x = 1\n")
    both = [tmp_path / "b.py", tmp_path / "a.py"]
    before = cache.hash_sources(both)
    assert cache.hash_sources(reversed(both)) == before
    (tmp_path / "b.py").write_text("x = 2\n")
    assert cache.hash_sources(both) != before


# --- building and finding --------------------------------------------------------------------------------------------


def test_an_engine_is_built_once_and_found_from_then_on(tmp_path):
    log = []
    first = cache.get_or_build(identity(), plans(log=log), tmp_path)
    assert not first.was_cached
    assert log == ["prompt", "decoder"]
    again = cache.get_or_build(identity(), must_not_build, tmp_path)
    assert again.was_cached
    assert again == first
    assert {name: again.read_plan(name) for name in PLANS} == PLANS
    assert visible(tmp_path) == [identity().key]
    assert (again.precision, again.tiers, again.library, again.size) == ("fp16", (1, 8, 32), "tensorrt-rtx", 11340)
    with pytest.raises(BadEngine, match="has no block_head; has prompt, decoder"):
        again.plan_file("block_head")


def test_the_manifest_says_what_was_built_from_what(tmp_path):
    engine = put(tmp_path)
    manifest = json.loads((engine.folder / "manifest.json").read_text())
    assert manifest["key"] == identity().key == engine.folder.name
    assert manifest["identity"] == TREE
    assert manifest["graphs"]["decoder"] == {
        "file": "decoder.plan", "sha256": cache.hash_file(engine.folder / "decoder.plan"), "size": 10240,
        "build_seconds": 0.25, "is_decomposed": False, "summary": SUMMARY,
    }  # fmt: skip


def test_the_cache_lies_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("VLA_SPEC_CACHE", str(tmp_path / "here"))
    assert cache.default_cache_dir() == tmp_path / "here"
    monkeypatch.delenv("VLA_SPEC_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.default_cache_dir() == tmp_path / "xdg" / "vla_spec" / "engines"


class Damage(NamedTuple):
    name: str
    do: object
    says: str


def cut(path, keep=0.5):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])


def flip(path, at=0.5):
    content = bytearray(path.read_bytes())
    content[int(len(content) * at)] ^= 1
    path.write_bytes(bytes(content))


def edit(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def exchange(folder):
    """Two plans under each other's names."""
    (folder / "prompt.plan").rename(folder / "x")
    (folder / "decoder.plan").rename(folder / "prompt.plan")
    (folder / "x").rename(folder / "decoder.plan")


DAMAGE = [
    Damage("cut plan", lambda f: cut(f / "decoder.plan"), "decoder.plan: cut off or of another build, 5120 bytes"),
    Damage("empty plan", lambda f: cut(f / "decoder.plan", 0), "cut off"),
    Damage("changed byte", lambda f: flip(f / "decoder.plan"), "decoder.plan: corrupt, its sha256"),
    Damage("missing plan", lambda f: (f / "decoder.plan").unlink(), "decoder.plan: missing"),
    Damage("exchanged", exchange, "cut off or of another build"),
    Damage("cut manifest", lambda f: cut(f / "manifest.json"), "damaged: "),
    Damage("no manifest", lambda f: (f / "manifest.json").unlink(), "damaged: "),
    Damage("other format", lambda f: edit(f / "manifest.json", lambda m: m.update(format=0)), "damaged: "),
    Damage("other key", lambda f: edit(f / "manifest.json", lambda m: m.update(key="0" * 64)), "damaged: "),
    Damage(
        "claims another device",
        lambda f: edit(f / "manifest.json", lambda m: m["identity"].update(device={"sm": [89, 120]})),
        "damaged: ",
    ),
    Damage(
        "claims another version",
        lambda f: edit(f / "manifest.json", lambda m: m["identity"]["library"].update(version="9")),
        "damaged: ",
    ),
    Damage(
        "points elsewhere",
        lambda f: edit(f / "manifest.json", lambda m: m["graphs"]["decoder"].update(file="../decoder.plan")),
        "damaged: ",
    ),
    Damage("not JSON", lambda f: (f / "manifest.json").write_bytes(b"\x80\x04cos\nsystem\n"), "damaged: "),
]


@pytest.fixture(scope="module")
def of_model(tmp_path_factory):
    """A cache with an engine of the shipped model."""
    folder = tmp_path_factory.mktemp("cache")
    cache.get_or_build(identity(files=cache.hash_model(MODEL, ("prompt", "decoder", "commit"))), plans(), folder)
    return folder


WANTED = Wanted("tensorrt-rtx", "1.7.1.116", "fp16", 89)


def read_all_plans(folder):
    """What a runtime does: find the engine, then read what it runs."""
    loaded = cache.load(MODEL, WANTED, folder)
    return {name: loaded.read_plan(name) for name in PLANS}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.name)
def test_a_damaged_engine_is_never_loaded_and_is_built_anew(damage, of_model, tmp_path):
    folder = shutil.copytree(of_model, tmp_path / "cache")
    (engine,) = cache.read_all(folder)[0]
    damage.do(engine.folder)
    with pytest.raises(BadEngine, match=damage.says.replace(".", r"\.")):
        read_all_plans(folder)
    log = []
    anew = cache.get_or_build(engine.identity, plans(log=log), folder)
    assert log == ["prompt", "decoder"]
    assert read_all_plans(folder) == PLANS
    assert visible(folder) == [anew.key]


def test_an_engine_is_loaded_by_what_the_device_can_run(of_model):
    engine = cache.load(MODEL, WANTED, of_model)
    assert engine.was_cached
    assert cache.load(MODEL, WANTED._replace(sm=86, tiers=(1, 8, 32)), of_model) == engine


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sm": 120}, "for SM86, SM89, wanted SM120"),
        ({"version": "1.8.0"}, "built with tensorrt-rtx 1.7.1.116, wanted 1.8.0"),
        ({"precision": "bf16"}, "in fp16, wanted bf16"),
        ({"backend": "tensorrt"}, "built with tensorrt-rtx, wanted tensorrt"),
        ({"tiers": (1, 4)}, "for tiers 1,8,32, wanted 1,4"),
        ({"device": {"sm": [89], "name": "X", "driver": 12040}}, "another device or driver (driver, name, sm)"),
    ],
)
def test_an_engine_for_something_else_is_refused_and_the_difference_named(changes, says, of_model):
    with pytest.raises(BadEngine) as error:
        cache.load(MODEL, WANTED._replace(**changes), of_model)
    assert says in str(error.value)
    assert "vla-spec build" in str(error.value)


def test_an_engine_of_a_model_that_has_changed_since_is_refused(of_model, tmp_path):
    model = shutil.copytree(MODEL, tmp_path / "model")
    assert cache.load(model, WANTED, of_model)
    flip(model / "decoder.onnx")
    with pytest.raises(BadEngine, match=r"of another model, or decoder\.onnx has changed since"):
        cache.load(model, WANTED, of_model)
    (model / "decoder.onnx").unlink()
    with pytest.raises(BadEngine, match=r"has no decoder\.onnx"):
        cache.load(model, WANTED, of_model)


def test_an_empty_cache_says_how_to_fill_it(tmp_path):
    with pytest.raises(BadEngine, match=r"holds none.*vla-spec build .* --sm 89"):
        cache.load(MODEL, WANTED, tmp_path / "nothing")


def test_engines_of_a_device_are_only_for_it(tmp_path):
    device = {"sm": [87], "name": "Orin", "memory_bytes": 1 << 35, "driver": 12060}
    files = cache.hash_model(MODEL, ("prompt", "decoder", "commit"))
    library = {"name": "tensorrt", "version": "10.16"}
    cache.get_or_build(identity(files=files, device=device, library=library), plans(), tmp_path)
    wanted = Wanted("tensorrt", "10.16", "fp16", 87, device)
    assert cache.load(MODEL, wanted, tmp_path).identity.device == device
    with pytest.raises(BadEngine, match=r"another device or driver \(driver\)"):
        cache.load(MODEL, wanted._replace(device=device | {"driver": 12050}), tmp_path)


# --- what goes wrong while it is written -----------------------------------------------------------------------------


@pytest.mark.parametrize("call", range(1, 4))
def test_a_full_disk_leaves_nothing_and_says_so(call, monkeypatch, tmp_path):
    calls = []

    def full(handle):
        calls.append(handle)
        if len(calls) == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cache.os, "fsync", full)
    with pytest.raises(BadEngine, match=r"can't be written \(No space left on device\); nothing was kept; free some"):
        put(tmp_path)
    assert visible(tmp_path) == []
    monkeypatch.undo()
    assert put(tmp_path).read_plan("decoder") == PLANS["decoder"]


@posix
def test_a_file_that_may_not_grow_leaves_nothing(tmp_path):
    done = run_python(
        """
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        try:
            put(folder)
        except BadEngine as error:
            print(error)
        print(visible(folder))
        """,
        tmp_path,
    )
    assert "decoder.plan: can't be written (File too large); nothing was kept" in done
    assert done.endswith("[]\n")


def test_a_build_that_fails_or_is_stopped_leaves_nothing(tmp_path):
    def fails():
        yield "prompt", Plan(b"x", 0, False, {})
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.get_or_build(identity(), fails, tmp_path)
    assert visible(tmp_path) == []
    assert cache.read_all(tmp_path) == ([], [])


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_that_may_not_be_written_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(BadEngine, match="can't be made"):
        put(tmp_path / "cache")


def test_a_cache_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(BadEngine, match=r"can't be made .*name another folder with --cache"):
        put(tmp_path / "cache")


def test_what_a_killed_builder_left_is_no_engine_and_is_removed(tmp_path):
    half = tmp_path / f".{identity().key}.123.abc.tmp"
    half.mkdir()
    (half / "prompt.plan").write_bytes(b"half")
    assert cache.read_all(tmp_path) == ([], [])
    engine = put(tmp_path)
    assert visible(tmp_path) == [engine.key]


# --- several builders ------------------------------------------------------------------------------------------------

PRELUDE = """
import sys
from pathlib import Path
sys.path[:0] = [{tests!r}]
from test_engine_cache import *
folder = Path({folder!r})
"""


def start_python(code, folder):
    lines = code.strip("\n").splitlines()
    indent = len(lines[0]) - len(lines[0].lstrip())
    text = PRELUDE.format(tests=str(Path(__file__).parent), folder=str(folder))
    text += "\n".join(line[indent:] for line in lines)
    return subprocess.Popen(
        [sys.executable, "-c", text], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True, bufsize=1
    )


def run_python(code, folder):
    process = start_python(code, folder)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return out


BUILDER = """
def build():
    print("building", flush=True)
    sys.stdin.readline()
    yield from plans()()
engine = cache.get_or_build(identity(), build, folder, lambda: print("waiting", flush=True))
print("cached" if engine.was_cached else "built", {name: engine.read_plan(name) for name in PLANS} == PLANS)
"""


@posix
def test_of_two_builders_the_second_waits_and_finds_what_the_first_made(tmp_path):
    with start_python(BUILDER, tmp_path) as first:
        assert first.stdout.readline() == "building\n"
        with start_python(BUILDER, tmp_path) as second:
            assert second.stdout.readline() == "waiting\n"
            first.stdin.write("go on\n")
            first.stdin.flush()
            assert first.stdout.readline() == "built True\n"
            assert second.stdout.readline() == "cached True\n"
    assert visible(tmp_path) == [identity().key]


@posix
def test_the_lock_of_a_killed_builder_holds_nobody_up(tmp_path):
    with start_python(BUILDER, tmp_path) as first:
        assert first.stdout.readline() == "building\n"
        first.send_signal(signal.SIGKILL)
        first.wait(timeout=30)
    assert list((tmp_path / ".locks").iterdir())  # it is still there, and means nothing
    log = []
    cache.get_or_build(identity(), plans(log=log), tmp_path)
    assert log == ["prompt", "decoder"]
    assert visible(tmp_path) == [identity().key]


@posix
def test_cleaning_leaves_alone_what_is_being_built(tmp_path):
    put(tmp_path, precision="bf16")
    with start_python(BUILDER, tmp_path) as first:
        assert first.stdout.readline() == "building\n"
        assert len(cache.clean(tmp_path)) == 1
        first.stdin.write("go on\n")
        first.stdin.flush()
        assert first.stdout.readline() == "built True\n"
    assert visible(tmp_path) == [identity().key]
    assert cache.clean(tmp_path) == [tmp_path / identity().key]
    assert visible(tmp_path) == []


def test_cleaning_one_model_keeps_the_engines_of_others(tmp_path):
    mine = cache.get_or_build(identity(files=cache.hash_model(MODEL, ("decoder",))), plans(), tmp_path)
    other = put(tmp_path)
    (tmp_path / "notes").mkdir()  # somebody's own
    assert cache.clean(tmp_path, MODEL) == [mine.folder]
    assert visible(tmp_path) == sorted([other.key, "notes"])


def test_identities_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        identity().precision = "int8"
