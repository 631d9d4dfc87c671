"""From raw records to a verdict: the judge, mutations of the records, and kill records of planted faults."""
