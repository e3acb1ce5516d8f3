"""Files in and out: written whole or not at all, described by a manifest, read with care."""
