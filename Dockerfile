FROM python:3.13-slim AS wheels
COPY requirements.txt /
RUN pip wheel --no-cache-dir --wheel-dir /wheels --requirement /requirements.txt

FROM python:3.13-slim
LABEL org.opencontainers.image.title="notifier" \
      org.opencontainers.image.description="Reaches a marketplace's buyers and sellers"
WORKDIR /app
RUN --mount=type=bind,from=wheels,source=/wheels,target=/wheels \
    pip install --no-cache-dir --root-user-action=ignore --no-index /wheels/*.whl
COPY gunicorn.conf.py .
COPY migrations/ migrations/
COPY notifier/ notifier/
# Compile now: the container's user cannot write here. Set modes: a checkout with a strict umask lets
# no other user read its files.
RUN chmod -R u=rwX,go=rX . && python -m compileall -q notifier
USER 10001:10001
EXPOSE 8080
STOPSIGNAL SIGTERM
# Not urllib, which would use a proxy from the environment.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s CMD ["python", "-c", "\
import http.client, os; \
host = os.environ.get('HTTP_SERVER_HOST', '').strip() or '127.0.0.1'; \
port = os.environ.get('HTTP_SERVER_PORT', '').strip().lstrip(':') or '8080'; \
connection = http.client.HTTPConnection(host, int(port), timeout=4); \
connection.request('GET', '/healthz'); \
exit(connection.getresponse().status != 200)"]
CMD ["gunicorn"]
