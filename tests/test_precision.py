"""`model.matmul_precision` reaches every product of training and prediction."""

import jax
import jax.numpy as jnp
import pytest
from jax.lax import Precision
from test_bfloat16 import CONVOLUTIONS, equations
from tiny_network import tiny_config, tiny_variables

from solov2_jax.inference.predictor import build_predictor
from solov2_jax.inference.programs import compile_detect
from solov2_jax.models import build_model
from solov2_jax.platforms import portable_forms
from solov2_jax.training.loss import build_loss
from solov2_jax.training.memory import batch_shapes, build_step


@pytest.fixture(autouse=True)
def plain_operations():
    """Others have no equations until they are lowered; test_platforms.py looks at them."""
    with portable_forms():
        yield


def precisions(jaxpr):
    """Returns those of a program's products, backward ones too."""
    products = [e for e in equations(jaxpr) if e.primitive.name in CONVOLUTIONS]
    assert len(products) > 30
    return {(e.params["precision"] or (Precision.DEFAULT,))[0] for e in products}


def train_step(config):
    step, state, mesh = build_step(config, None)
    return step._step.trace(state, batch_shapes(8, 8, 64, 64, mesh), step._inputs).jaxpr


def prediction(config):
    model = build_model(config, 2)
    compile_detect.cache_clear()  # of programs that were traced in other forms
    detect = build_predictor(config, model, tiny_variables(config))._detect._run
    sizes = jnp.zeros((1, 2), jnp.int32)
    image = jnp.zeros((1, 64, 64, 3), jnp.uint8)
    return detect.trace(tiny_variables(config), image, sizes).jaxpr


def moments(config):
    config.model.backbone.norm = "sync_bn"
    model = build_model(config, 2)
    image = jnp.zeros((1, 64, 64, 3), jnp.uint8)
    batch = {"image": image, "image_size": jnp.full((1, 2), 64)}
    run = build_loss(config, model).moments
    assert run
    return jax.make_jaxpr(run)(tiny_variables(config), batch)


@pytest.mark.parametrize("program", [train_step, prediction, moments])
def test_every_product_has_the_precision_of_the_config(program):
    config = tiny_config()
    config.train.batch_size = 8
    assert Precision.DEFAULT in precisions(program(config).jaxpr)
    config.model.matmul_precision = "highest"
    assert precisions(program(config).jaxpr) == {Precision.HIGHEST}
