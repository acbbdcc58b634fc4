"""A simulated accelerator, for testing without a GPU. Importing compiles nothing; `load()` does, once per machine."""

from prefetch_offload.testing.simgpu import SimulatorUnavailable, load, simulated_device

__all__ = ["SimulatorUnavailable", "load", "simulated_device"]
