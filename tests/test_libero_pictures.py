"""LIBERO's renderer against MuJoCo's own, where a context for drawing can be made."""

import numpy as np
import pytest

from vla_spec.errors import MissingDependency
from vla_spec.robots._gl import select_gl_backend
from vla_spec.robots._libero_pictures import SceneRenderer

SCENE = """
<mujoco><worldbody><light pos="0 0 3"/><camera name="side" pos="0 -1 0.3" xyaxes="1 0 0 0 0.2 1"/>
<camera name="top" pos="0 0 1"/>
<geom name="floor" type="plane" size="1 1 .1" rgba=".2 .6 .3 1" group="1"/>
<geom name="hidden" type="sphere" pos="-.2 0 .1" size=".1" rgba="1 0 0 1" group="0"/>
<body pos=".2 0 .1"><freejoint/><geom name="box" type="box" size=".1 .05 .1" rgba="{colour} 1" group="1"/></body>
</worldbody></mujoco>"""


def world(colour=".2 .3 .9"):
    mujoco = pytest.importorskip("mujoco", reason="needs the extra [libero] or [sim]")
    model = mujoco.MjModel.from_xml_string(SCENE.format(colour=colour))
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    return mujoco, model, data


@pytest.fixture(scope="module", autouse=True)
def drawing():
    try:
        select_gl_backend()
    except MissingDependency as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_pictures_equal_mujocos_upside_down_without_collision_shapes():
    mujoco, model, data = world()
    reference = mujoco.Renderer(model, 64, 64, max_geom=1000)
    visible = mujoco.MjvOption()
    visible.geomgroup[0] = 0
    ours = SceneRenderer(model, 64)
    for camera in ("side", "top"):
        reference.update_scene(data, camera=camera, scene_option=visible)
        picture = ours.draw(data, camera)
        np.testing.assert_array_equal(picture[::-1], reference.render())
        assert not ((picture[..., 0] > 200) & (picture[..., 1] < 50)).any()  # the red sphere is not for the eyes
    ours.close()
    reference.close()


@pytest.mark.slow
def test_without_antialiasing_only_edges_differ():
    _, model, data = world()
    smooth = SceneRenderer(model, 64)
    picture = smooth.draw(data, "side").astype(int)
    smooth.close()
    hard = SceneRenderer(model, 64, is_antialiased=False)
    differs = (hard.draw(data, "side") != picture).any(axis=-1)
    hard.close()
    assert 0 < differs.mean() < 0.2


@pytest.mark.slow
def test_two_renderers_take_turns():
    _, model, data = world()
    _, other_model, other_data = world(".9 .9 .1")
    one, other = SceneRenderer(model, 64), SceneRenderer(other_model, 64)
    first, second = one.draw(data, "side"), other.draw(other_data, "side")
    assert first.max() > 50
    assert second.max() > 50
    assert (first != second).any()
    np.testing.assert_array_equal(one.draw(data, "side"), first)
    one.close()
    np.testing.assert_array_equal(other.draw(other_data, "side"), second)
    other.close()


@pytest.mark.slow
def test_a_renderer_outlives_the_model_that_it_was_made_for():
    _, model, data = world()
    renderer = SceneRenderer(model, 64)
    before = renderer.draw(data, "side")
    mujoco, again, moved = world()
    moved.qpos[0] -= 0.3
    mujoco.mj_forward(again, moved)
    renderer.show(again)
    del model, data
    after = renderer.draw(moved, "side")
    fresh = SceneRenderer(again, 64)
    np.testing.assert_array_equal(after, fresh.draw(moved, "side"))
    assert (after != before).any()
    fresh.close()
    renderer.close()
