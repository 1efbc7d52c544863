"""Weights: other projects' checkpoints in, a file of our own, and back out.

On the way in, `convert` goes through these in order:

    sources    what the user means: a model, a file, a directory, a URL, a repository or a name
    directories  which checkpoint in one is meant; shards knows those in several files
    cache      from a name or an address to a verified file, by `download`; converted files, kept
    files      from a file in any container to names and tensors; pickles looks into a pickle, reading takes the values
    recognise  from names and shapes to a format and an architecture; side_files reads the config.json beside it
    formats    the tables, one per format; rules is the engine that reads them forwards and backwards
    adapt      the lossy steps: positions for another grid, image channels, new heads
    checkpoint our own file

`export` and `push` go the other way, and `verify` looks whether a file of ours is whole.
"""
