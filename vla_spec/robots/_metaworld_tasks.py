"""The embedded policy's tasks: Meta-World names, and the sentences that ask for them.

Meta-World has no language; these sentences are ours. The last sentence of each task is held out: training never sees
it (its words all occur elsewhere), evaluation uses nothing else.
Source: Meta-World, Yu et al. 2019, arXiv:1910.10897.
"""

from __future__ import annotations

from typing import NamedTuple


class Task(NamedTuple):
    """One task. ``needs_precision`` marks those whose tolerance is a few millimetres to two centimetres."""

    environment: str  # Meta-World's name
    phrasings: tuple[str, ...]  # for training
    held_out: str  # for evaluation only
    needs_precision: bool = False


TASKS: dict[str, Task] = {
    "button-press-topdown": Task(
        "button-press-topdown-v3",
        ("press the button from above", "push the button down", "press the top button down"),
        "push down the button from above",
    ),
    "drawer-open": Task(
        "drawer-open-v3",
        ("open the drawer", "pull the drawer open", "pull out the drawer"),
        "pull open the drawer",
    ),
    "drawer-close": Task(
        "drawer-close-v3",
        ("close the drawer", "push the drawer closed", "shut the drawer"),
        "push the drawer shut",
    ),
    "door-open": Task(
        "door-open-v3",
        ("open the door", "pull the door open by its handle", "swing the door open"),
        "pull open the door",
    ),
    "window-open": Task(
        "window-open-v3",
        ("open the window", "slide the window open", "push the window open"),
        "slide open the window",
    ),
    "window-close": Task(
        "window-close-v3",
        ("close the window", "slide the window closed", "shut the window"),
        "slide the window shut",
    ),
    "handle-press": Task(
        "handle-press-v3",
        ("press the handle down", "push the handle down", "press down the handle"),
        "push down the handle",
    ),
    "handle-press-side": Task(
        "handle-press-side-v3",
        ("press the side handle down", "push the handle on the side down", "press down the sideways handle"),
        "push down the side handle",
    ),
    "faucet-open": Task(
        "faucet-open-v3",
        ("open the faucet", "turn on the tap", "turn the faucet on"),
        "turn on the faucet",
    ),
    "faucet-close": Task(
        "faucet-close-v3",
        ("close the faucet", "turn off the tap", "turn the faucet off"),
        "turn off the faucet",
    ),
    "coffee-button": Task(
        "coffee-button-v3",
        ("press the button of the coffee machine", "start the coffee machine", "make coffee"),
        "press the coffee button",
    ),
    "door-close": Task(
        "door-close-v3",
        ("close the door", "push the door closed", "shut the door"),
        "push the door shut",
    ),
    "button-press": Task(
        "button-press-v3",
        ("press the button", "press the red button", "push the button in"),
        "push in the red button",
        needs_precision=True,
    ),
    "plate-slide": Task(
        "plate-slide-v3",
        ("slide the plate into the goal", "push the puck into the net", "slide the puck into the net"),
        "push the plate into the goal",
        needs_precision=True,
    ),
    "push": Task(
        "push-v3",
        ("push the cylinder to the green dot", "move the cylinder to the goal dot", "push the object to the green dot"),
        "move the object to the green dot",
        needs_precision=True,
    ),
}
