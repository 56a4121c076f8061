"""Measurements that are commands of the project: nothing counts that was not measured in the same run."""
