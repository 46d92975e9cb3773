"A real Jupyter server, and a person who runs a notebook in it cell by cell and saves."
import json, secrets, socket, time, urllib.request, uuid

import websocket


class Jupyter:
    "A server on a workspace; leaving the `with` block ends it."
    def __init__(self, workspace):
        self.token = secrets.token_hex(16)
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{s.getsockname()[1]}"
        self.process = workspace.start("jupyter", "lab", "--config", "jupyter_server_config.py", "--no-browser", "--allow-root", "--ServerApp.root_dir=.",
                                       f"--ServerApp.port={self.address.split(':')[1]}", "--ServerApp.port_retries=0", env={"JUPYTER_TOKEN": self.token})

    def __enter__(self):
        for _ in range(300):
            try: return self.ask("GET", "api") and self
            except OSError: time.sleep(.1)
        raise TimeoutError("no server")

    def __exit__(self, *_):
        self.process.terminate()
        self.process.communicate()

    def ask(self, method, path, content=None):
        "One call of the REST interface (jupyter-server.readthedocs.io/en/latest/developers/rest-api.html)."
        headers = {"Authorization": f"token {self.token}", "Content-Type": "application/json"}
        request = urllib.request.Request(f"http://{self.address}/{path}", json.dumps(content).encode() if content else None, headers, method=method)
        with urllib.request.urlopen(request) as answer: return json.loads(answer.read() or "null")

    def run_all_and_save(self, path):
        "What JupyterLab does on Run All and Save; the outputs of the cells."
        notebook = self.ask("GET", f"api/contents/{path}")["content"]
        session = self.ask("POST", "api/sessions", dict(path=path, name=path, type="notebook", kernel=dict(name="python3")))
        channel = websocket.create_connection(f"ws://{self.address}/api/kernels/{session['kernel']['id']}/channels?token={self.token}", timeout=300)
        for count, cell in enumerate((c for c in notebook["cells"] if c["cell_type"] == "code"), 1):
            cell["execution_count"], cell["outputs"] = count, execute(channel, cell["source"])
            if any(o["output_type"] == "error" for o in cell["outputs"]): break
        notebook["metadata"]["language_info"] = dict(name="python", version="3", file_extension=".py")
        self.ask("PUT", f"api/contents/{path}", dict(type="notebook", format="json", content=notebook))
        channel.close()
        self.ask("DELETE", f"api/sessions/{session['id']}")
        return [o for c in notebook["cells"] for o in c.get("outputs", [])]


def execute(channel, source):
    "Run one cell; its outputs (jupyter-client.readthedocs.io/en/stable/messaging.html)."
    id, outputs = uuid.uuid4().hex, []
    header = dict(msg_id=id, msg_type="execute_request", username="team", session=id, version="5.3")
    content = dict(code=source, silent=False, store_history=True, user_expressions={}, allow_stdin=False, stop_on_error=True)
    channel.send(json.dumps(dict(channel="shell", header=header, parent_header={}, metadata={}, content=content)))
    while True:
        message = json.loads(channel.recv())
        if message["parent_header"].get("msg_id") != id or message["channel"] != "iopub": continue
        kind, content = message["msg_type"], message["content"]
        if kind == "status" and content["execution_state"] == "idle": return outputs
        if kind in ("stream", "display_data", "execute_result", "error"):
            outputs.append({k: v for k, v in content.items() if k != "transient"} | dict(output_type=kind))
