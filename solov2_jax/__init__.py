"""SOLOv2 instance segmentation in JAX. Start reading at `solov2_jax.structs`."""

__version__ = "0.1.0"
