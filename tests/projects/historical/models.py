from django.contrib.auth.models import User
from simple_history import register

register(User, app="tests.projects.historical")
