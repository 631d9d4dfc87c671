"""The public import path of what another project's faults are made of."""
