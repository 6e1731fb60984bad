"""Files that travel in exported folders: a student behind the interfaces of other people's libraries.

They import our own code like any other file; `trainer.exports.carried_code` copies what they import beside them, so that
a folder needs no radio-cache where it is used.
"""
