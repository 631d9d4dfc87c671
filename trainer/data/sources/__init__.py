"""What a source of data holds: which fields of a record count, which files were read, which were not."""
