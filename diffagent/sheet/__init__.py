"""Files of prompts or pictures in, a contact sheet of scored pictures out."""
