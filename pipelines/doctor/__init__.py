"""`haechi doctor`: looks at what the settings point to, changes nothing, and names symptom, cause and fix."""
