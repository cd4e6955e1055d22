"""The commands of `qnoise`, a file each, and the arguments they share."""
