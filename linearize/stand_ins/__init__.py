"""What takes the place of some modules in the code that travels with a checkpoint: see `linearize.remote_code`.

Nothing here is imported; the files are read as text. The names are those of the modules they stand for.
"""
