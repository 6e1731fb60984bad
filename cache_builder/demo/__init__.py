"""The offline demo: photographs that install as packages, cut into crops, through the whole pipeline."""
