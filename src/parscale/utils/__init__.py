"""What every part of the library needs and none owns: files that are whole or absent, hashes, locks."""
