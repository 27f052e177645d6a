// A browser starts no worker from the file system, and the site's search is a worker. Where the site is opened from
// there, this runs a worker in a hidden frame instead. Messages are copied, as between threads.
if (location.protocol === "file:") {
  const message = (data) => new MessageEvent("message", { data: structuredClone(data) });

  window.Worker = class {
    constructor(url) {
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      this.frame.srcdoc = `<script src="${url}"></script>`;
      this.inside = new Promise((resolve) => {
        this.frame.addEventListener("load", () => {
          const inside = this.frame.contentWindow;
          inside.postMessage = (data) => this.onmessage?.(message(data));
          resolve(inside);
        });
      });
      document.body.append(this.frame);
    }

    postMessage(data) {
      this.inside.then((inside) => inside.onmessage(message(data)));
    }

    terminate() {
      this.frame.remove();
    }
  };
}
