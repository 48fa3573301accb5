package virtfleet

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const (
	proxyStart      = 30 * time.Second
	proxyEnd        = 10 * time.Second
	proxyTextLimit  = 4096
	proxySocketHead = "/"
)

var errClosed = errors.New("the client is closed")

// proxy is the helper process `virtfleet proxy URI`, which gives a unix socket for any transport. It is started at the first
// connection, and again when it has died.
type proxy struct {
	program string
	uri     string
	said    atomic.Pointer[tail] // what the process that was started last has said

	mutex   sync.Mutex
	running *proxyProcess
	closed  bool
}

type proxyProcess struct {
	socket string
	input  io.Closer
	kill   func() error
	ended  chan struct{}
	said   *tail
}

func newProxy(uri string) *proxy {
	program := os.Getenv("VIRTFLEET_COMMAND")
	if program == "" {
		program = "virtfleet"
	}
	return &proxy{program: program, uri: uri}
}

// dial opens one connection through the helper.
func (p *proxy) dial(ctx context.Context) (net.Conn, error) {
	process, err := p.process(ctx)
	if err != nil {
		return nil, err
	}
	var dialer net.Dialer
	conn, err := dialer.DialContext(ctx, "unix", process.socket)
	if err != nil {
		return nil, fmt.Errorf("%s proxy %s: %w%s", p.program, p.uri, err, process.said.quoted())
	}
	return conn, nil
}

func (p *proxy) process(ctx context.Context) (*proxyProcess, error) {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	if p.closed {
		return nil, errClosed
	}
	if p.running != nil {
		select {
		case <-p.running.ended:
			p.running = nil
		default:
			return p.running, nil
		}
	}
	started, err := p.start(ctx)
	if err != nil {
		return nil, fmt.Errorf("%s proxy %s: %w", p.program, p.uri, err)
	}
	p.running = started
	return started, nil
}

func (p *proxy) start(ctx context.Context) (*proxyProcess, error) {
	command := exec.Command(p.program, "proxy", p.uri)
	input, err := command.StdinPipe()
	if err != nil {
		return nil, err
	}
	output, err := command.StdoutPipe()
	if err != nil {
		return nil, err
	}
	process := &proxyProcess{input: input, ended: make(chan struct{}), said: &tail{}}
	p.said.Store(process.said)
	command.Stderr = process.said
	if err := command.Start(); err != nil {
		return nil, err
	}
	process.kill = command.Process.Kill
	lines := make(chan string, 1)
	go func() {
		line, _ := bufio.NewReader(io.LimitReader(output, proxyTextLimit)).ReadString('\n')
		lines <- strings.TrimSpace(line)
		_, _ = io.Copy(io.Discard, output) // nothing else is said there; a full pipe must not stop it
		_ = command.Wait()                 // how it ended is in what it said
		close(process.ended)
	}()
	timer := time.NewTimer(proxyStart)
	defer timer.Stop()
	select {
	case line := <-lines:
		if strings.HasPrefix(line, proxySocketHead) {
			process.socket = line
			return process, nil
		}
		err = fmt.Errorf("it names no socket%s", p.ending(process))
	case <-timer.C:
		err = fmt.Errorf("it names no socket within %v%s", proxyStart, p.ending(process))
	case <-ctx.Done():
		p.ending(process)
		err = context.Cause(ctx)
	}
	return nil, err
}

// ending ends a process in good order, by force if it does not heed that, and returns what it has said.
func (p *proxy) ending(process *proxyProcess) string {
	_ = process.input.Close()
	select {
	case <-process.ended:
	case <-time.After(proxyEnd):
		_ = process.kill()
		<-process.ended
	}
	return process.said.quoted()
}

func (p *proxy) close() {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	p.closed = true
	if p.running != nil {
		p.ending(p.running)
		p.running = nil
	}
}

// explained adds to an error of the connection what the helper says of it (the words of ssh, say): gRPC sees a closed socket only.
func (p *proxy) explained(err error) error {
	known := status.Convert(err)
	if err == nil || known.Code() != codes.Unavailable || len(known.Details()) > 0 {
		return err
	}
	said := p.said.Load().lastWords()
	if said == "" || strings.Contains(known.Message(), said) {
		return err
	}
	return status.Error(codes.Unavailable, known.Message()+": "+said)
}

func (p *proxy) explainUnary(
	ctx context.Context, method string, request, reply any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker,
	options ...grpc.CallOption,
) error {
	return p.explained(invoke(ctx, method, request, reply, conn, options...))
}

func (p *proxy) explainStream(
	ctx context.Context, description *grpc.StreamDesc, conn *grpc.ClientConn, method string, open grpc.Streamer,
	options ...grpc.CallOption,
) (grpc.ClientStream, error) {
	stream, err := open(ctx, description, conn, method, options...)
	if err != nil {
		return nil, p.explained(err)
	}
	return &explainedStream{stream, p}, nil
}

type explainedStream struct {
	grpc.ClientStream
	proxy *proxy
}

// RecvMsg is part of grpc.ClientStream.
func (s *explainedStream) RecvMsg(message any) error {
	err := s.ClientStream.RecvMsg(message)
	if errors.Is(err, io.EOF) {
		return err
	}
	return s.proxy.explained(err)
}

// tail keeps the end of what a program says.
type tail struct {
	mutex sync.Mutex
	text  []byte
}

// Write is part of io.Writer.
func (t *tail) Write(more []byte) (int, error) {
	t.mutex.Lock()
	defer t.mutex.Unlock()
	t.text = append(t.text, more...)
	if over := len(t.text) - proxyTextLimit; over > 0 {
		t.text = t.text[over:]
	}
	return len(more), nil
}

func (t *tail) quoted() string {
	if text := t.trimmed(); text != "" {
		return ": " + text
	}
	return ""
}

// lastWords returns the last two lines that differ; attempts that fail alike say the same. A nil tail has said nothing.
func (t *tail) lastWords() string {
	if t == nil {
		return ""
	}
	var lines []string
	for line := range strings.Lines(t.trimmed()) {
		if line = strings.TrimSpace(line); line != "" {
			lines = append(lines, line)
		}
	}
	lines = lines[max(0, len(lines)-2):]
	return strings.Join(slices.Compact(lines), "; ")
}

func (t *tail) trimmed() string {
	t.mutex.Lock()
	defer t.mutex.Unlock()
	return strings.TrimSpace(string(t.text))
}
