"""Files: written whole or not at all, described by a manifest, and checked before they are read."""
