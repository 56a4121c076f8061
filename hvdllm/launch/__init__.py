"""Starts runs. sweep.py trains the points of a sweep, each by a launcher (base.py): here, by horovodrun or by Slurm."""
