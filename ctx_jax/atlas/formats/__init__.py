"""Readers of labelled data: the files that others have published, and a folder of one's own in the same formats."""
