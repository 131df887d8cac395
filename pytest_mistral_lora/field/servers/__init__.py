"""The kinds of servers of this package."""
