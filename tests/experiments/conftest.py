"""Its folder is on the import path, so that tests can import `data_front`."""
