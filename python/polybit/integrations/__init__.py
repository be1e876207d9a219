"""Where polybit meets other libraries; each module imports its library, and nothing else imports these."""
