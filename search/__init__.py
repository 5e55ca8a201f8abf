"""Search campaigns, imported as ``metaprune.search``."""

if __name__ != "metaprune.search":
    raise ImportError("this folder is the package `metaprune.search`; import it by that name.")
