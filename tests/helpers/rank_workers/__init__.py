"""What ranks do in the tests of ``tests/distributed``: functions of modules that they can import."""
