"""Starting the tasks of a plan: script text, the local backend, dry runs. Called by the verbs submit and cancel."""
