"""Rows from other formats: recognise, convert, report."""
