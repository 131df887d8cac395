"""What servers make of a request, and the files that they read."""
