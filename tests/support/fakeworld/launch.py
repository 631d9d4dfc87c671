"""The real launcher in the fake world."""

from fakeworld.plugin import install, install_probe
from q4kd.harness.child import launch

install()
install_probe()
launch()
