"""Fails at import, as a package does whose own library is missing."""

raise ImportError("libparity.so.3: cannot open shared object file")
