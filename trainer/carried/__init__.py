"""Files of exported folders: a student behind the interfaces of other libraries.

They import radio-cache like any other file. `trainer.exports.carried_code` copies the imported files beside them, so that
a folder can be used without radio-cache.
"""
