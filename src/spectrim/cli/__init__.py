"""The commands: ``spectrim`` runs, ``spectrim-train`` trains, ``spectrim-grid`` tells how far a grid is."""
