"""docs/ros.md has the parameters that the nodes have. `python tests/test_ros_docs.py` writes them. Needs rclpy."""

import importlib
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "ros.md"
NODES = ("policy_node", "action_node", "sim_node", "camera_node", "monitor_node", "replay_node")
BEGIN, END = "<!-- parameters -->\n", "<!-- end of parameters -->\n"


def tables():
    """One per node; the quality of service, which is the same everywhere, as a list of topics."""
    text = [BEGIN]
    for name in NODES:
        parameters = importlib.import_module(f"vla_spec.nodes.{name}").PARAMETERS
        text += [f"\n### `{name}`\n\n", "| name | default | may change | what | valid |\n|---|---|---|---|---|\n"]
        for p in parameters:
            if p.name.startswith("qos."):
                continue
            valid = ", ".join(p.choices) if p.choices else "" if p.low is None else f"{p.low:g} to {p.high:g}"
            changes = "" if p.is_fixed else "yes"
            text.append(f"| `{p.name}` | `{p.default!r}` | {changes} | {p.meaning} | {valid} |\n")
        topics = dict.fromkeys(p.name.split(".")[1] for p in parameters if p.name.startswith("qos."))
        if topics:
            text.append(f"\n`qos` of: {', '.join(f'`{topic}`' for topic in topics)}.\n")
    return "".join([*text, END])


def test_the_page_has_the_parameters_that_the_nodes_have():
    pytest.importorskip("rclpy")
    text = PAGE.read_text()
    assert tables() in text, "run: python tests/test_ros_docs.py"


def test_the_page_names_every_topic_and_service_of_the_nodes():
    import re

    text = PAGE.read_text()
    for path in (PAGE.parents[1] / "nodes").glob("*_node.py"):
        source = path.read_text()
        made = re.findall(r'(?:create_\w+|hear|speak)\(\s*\w+,\s*"([\w/~]+)"', source)
        for name in made:
            assert name.replace("~", "policy_node") in text, f"{path.name}: {name}"


def test_the_page_names_every_key_of_the_provenance():
    pytest.importorskip("rclpy")
    from dataclasses import fields

    from vla_spec.nodes._messages import ChunkInfo

    text = PAGE.read_text()
    assert all(f"`{field.name}`" in text for field in fields(ChunkInfo))


if __name__ == "__main__":
    page = PAGE.read_text()
    head, _, rest = page.partition(BEGIN)
    tail = rest.partition(END)[2] if END in rest else rest
    PAGE.write_text(head + tables() + tail)
