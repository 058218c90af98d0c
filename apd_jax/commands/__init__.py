"""Readers and writers of workdirs, behind the command line."""
