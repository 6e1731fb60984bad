"""The offline demo: crops of photographs that ship with two packages, through the whole pipeline."""
