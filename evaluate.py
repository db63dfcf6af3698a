"""Evaluates: `solov2 evaluate` from the sources; see --help."""

from solov2_jax.tools.cli.evaluate import run

if __name__ == "__main__":
    run()
