"""What a run learns, and from which items. README.md says what each task is, and how to add one."""
