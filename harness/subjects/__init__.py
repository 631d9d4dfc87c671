"""The subjects under test, a folder each: experiments, the probes that they run, the faults that are planted in them.

A module is found by its name: ``probes*`` registers probes, ``faults*`` registers faults, every other module registers
experiments. A new subject is a new folder; nothing lists it.
"""
