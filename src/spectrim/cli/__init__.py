"""The commands: ``spectrim`` runs, ``spectrim-train`` trains."""
