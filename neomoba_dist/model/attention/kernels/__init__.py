"""The kernels of attention: operators, layouts, the reference, and one folder per device."""
