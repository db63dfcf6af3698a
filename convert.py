"""Converts weights: `solov2 convert` from the sources; see --help."""

from solov2_jax.tools.cli.convert import run

if __name__ == "__main__":
    run()
