"""Exports a trained network: `solov2 export` from the sources; see --help."""

from solov2_jax.tools.cli.export import run

if __name__ == "__main__":
    run()
