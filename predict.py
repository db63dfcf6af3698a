"""Predicts objects in images: `solov2 predict` from the sources; see --help."""

from solov2_jax.tools.cli.predict import run

if __name__ == "__main__":
    run()
