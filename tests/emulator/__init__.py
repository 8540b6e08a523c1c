"""An emulator of the PTX that the kernels use, so that they are executed where there is no GPU: README.md."""
