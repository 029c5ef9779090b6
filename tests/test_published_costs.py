"""Cost tables from published figures: readable, labelled, for virtual time, and derived as they say."""

from __future__ import annotations

from pathlib import Path

import pytest

from vla_spec.assemble import Assembler
from vla_spec.calib import cost_file
from vla_spec.calib.cost_file import read_cost_file
from vla_spec.config import read_mode, resolve
from vla_spec.errors import BadConfig
from vla_spec.evaluation import first_observation

FOLDER = Path(cost_file.__file__).parent / "published"
FILES = sorted(FOLDER.glob("*.costs.json"))
MS = 1e6


def medians_ms(name):
    """encode, prefill, single step, and drafts by size."""
    (table,) = read_cost_file(FOLDER / f"{name}.costs.json").tables
    draft = {k: cost.median / MS for k, cost in table.drafters[0].draft.items()}
    return table.encode.median / MS, table.prefill.median / MS, table.step[1].median / MS, draft


def test_all_devices_are_there():
    devices = {read_cost_file(path).device.gpu for path in FILES}
    assert devices == {
        "NVIDIA A800",
        "NVIDIA H100",
        "NVIDIA GeForce RTX 4090",
        "NVIDIA Jetson Thor",
        "NVIDIA Jetson Orin",
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name.partition(".")[0])
def test_a_published_table_is_an_estimate_for_virtual_time(path):
    file = read_cost_file(path)
    assert file.origin == "published"
    assert "estimate" in file.label
    assert file.sources
    tree = {**read_mode("ngram")[1], "engine": "toy", "robot": "toy"}
    virtual = resolve({**tree, "runtime": {"costs": str(path), "clock": "virtual"}}, "ngram")
    assembler = Assembler()
    observation = first_observation(assembler, virtual.robot, None, 0)
    assembly = assembler.assemble(virtual, observation)
    assert assembly.costs.prefill_ns == file.tables[0].prefill.median
    real = resolve({**tree, "runtime": {"costs": str(path)}}, "ngram")
    with pytest.raises(BadConfig, match=r"published figures .*estimate.*runtime\.clock=virtual"):
        assembler.assemble(real, observation)
    allowed = resolve({**tree, "runtime": {"costs": str(path), "allow_other_device": True}}, "ngram")
    assert assembler.assemble(allowed, observation).costs == assembly.costs


def test_a800_follows_from_the_split_and_from_the_speed_of_strict_speculation():
    encode, prefill, step, draft = medians_ms("a800_openvla_7b")
    assert (encode, step) == (53, 13.9)
    assert prefill == pytest.approx(8 + (113 - 6 * 13.9))
    assert encode + prefill + 6 * step == pytest.approx(174)
    strict = encode + prefill + 6 / 1.68 * (draft[4] + step)
    assert strict == pytest.approx(174 / 0.865, rel=1e-4)


def test_rtx_4090_gives_back_the_three_times_that_it_was_solved_from():
    encode, prefill, step, draft = medians_ms("rtx4090_openvla_7b")
    fixed, one_round = encode + prefill, draft[4] + step
    assert fixed + 6 * step == pytest.approx(161.9, rel=1e-4)
    assert fixed + 6 / 1.63 * one_round == pytest.approx(178.6, rel=1e-4)
    assert fixed + 6 / 2.36 * one_round == pytest.approx(141.3, rel=1e-4)


def test_h100_gives_back_both_rates():
    encode, prefill, step, _ = medians_ms("h100_openvla_7b")
    assert 7e3 / (encode + prefill + 6 * step) == pytest.approx(51.0, rel=1e-4)
    assert 21e3 / (encode + prefill + 20 * step) == pytest.approx(54.3, rel=1e-4)


def test_thor_gives_back_rate_and_speed_up():
    _, prefill, step, draft = medians_ms("jetson_thor_vlm_7b_nvfp4")
    assert prefill == pytest.approx(25.7 + 51)
    assert 1e3 / step == pytest.approx(57.7, rel=1e-4)
    # Llama's own round, scaled to this model's step: 5.21 tokens in it are 3.45 times as fast as one by one.
    assert 5.21 * step / (step + draft[6]) == pytest.approx(189.2 / 54.9, rel=1e-4)


def test_orin_is_thor_times_one_ratio():
    ratio = 165.67 / 41.16
    _, prefill, step, draft = medians_ms("jetson_orin_vlm_7b_bf16")
    _, on_thor, thor_step, thor_draft = medians_ms("jetson_thor_vlm_7b_nvfp4")
    assert prefill == pytest.approx(on_thor * ratio, rel=1e-4)
    assert step == pytest.approx(33.0 * ratio, rel=1e-4)
    assert draft[6] / step == pytest.approx(thor_draft[6] / thor_step, rel=1e-4)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name.partition(".")[0])
def test_drafting_is_one_drafter_forward_per_depth_and_steps_are_flat(path):
    (table,) = read_cost_file(path).tables
    draft = table.drafters[0].draft
    assert all(cost.median == pytest.approx(k * draft[1].median, rel=1e-3) for k, cost in draft.items())
    assert table.step[64].median == table.step[1].median
