package virtfleet

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"

	commonv1 "virtfleet.dev/go/common/v1"
)

const (
	messageLimit     = 8 << 20 // answers stay below 3 MiB
	keepaliveTime    = 20 * time.Second
	keepaliveTimeout = 10 * time.Second
	firstReconnect   = 100 * time.Millisecond
	longestReconnect = 5 * time.Second
	connectTimeout   = 10 * time.Second
)

// Client is a connection to a fleet's gateway, or to one service of a node, with a client for each service of the API:
// Domains, Volumes, Networks, Nodes and so on. Goroutines may share it.
//
// Every call through it gets a request_id if it is a mutation, is repeated after UNAVAILABLE where that cannot have a second
// effect, and fails with an [*Error].
type Client struct {
	Services
	conn  *grpc.ClientConn
	proxy *proxy
}

type dialPlan struct {
	where   *Context
	context string
	files   *Credentials
	grpc    []grpc.DialOption
}

// Option changes what Dial does.
type Option func(*dialPlan)

// WithAddress says where the fleet is, instead of the environment and the context file: tls://HOST:PORT, HOST:PORT, unix:///PATH,
// or what `virtfleet proxy` understands (ssh://…, command:…).
func WithAddress(address string) Option {
	return func(plan *dialPlan) { plan.where = &Context{Address: address} }
}

// WithCredentials names the files of mutual TLS, instead of those of the environment or of the context.
func WithCredentials(files Credentials) Option {
	return func(plan *dialPlan) { plan.files = &files }
}

// WithContext names a context of the context file.
func WithContext(name string) Option {
	return func(plan *dialPlan) { plan.context = name }
}

// WithGRPC adds options of gRPC, such as interceptors of tracing.
func WithGRPC(options ...grpc.DialOption) Option {
	return func(plan *dialPlan) { plan.grpc = append(plan.grpc, options...) }
}

// Dial returns a client. Without options the fleet is the one of VIRTFLEET_ADDRESS (with VIRTFLEET_CA_FILE, VIRTFLEET_CERT_FILE
// and VIRTFLEET_KEY_FILE), else the context that VIRTFLEET_CONTEXT names, else the current context of the context file.
//
// Dial fails on a wrong address and on files that cannot be read. It does not wait for the fleet: the connection is made at the
// first call; see [Client.WaitReady]. For addresses that need a helper process, ctx limits its start.
func Dial(ctx context.Context, options ...Option) (*Client, error) {
	plan := &dialPlan{}
	for _, option := range options {
		option(plan)
	}
	where, err := plan.find()
	if err != nil {
		return nil, err
	}
	place, err := parseAddress(where.Address)
	if err != nil {
		return nil, err
	}
	client := &Client{}
	settings := []grpc.DialOption{
		grpc.WithUnaryInterceptor(interceptUnary),
		grpc.WithStreamInterceptor(interceptStream),
		grpc.WithUserAgent("virtfleet-go"),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(messageLimit)),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: keepaliveTime, Timeout: keepaliveTimeout}),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff: backoff.Config{
				BaseDelay: firstReconnect, Multiplier: 1.6, Jitter: 0.2, MaxDelay: longestReconnect,
			},
			MinConnectTimeout: connectTimeout,
		}),
	}
	if place.secure {
		files, err := newFileCredentials(where.Credentials)
		if err != nil {
			return nil, err
		}
		if place.serverName != "" {
			settings = append(settings, grpc.WithAuthority(place.serverName)) // the certificate is held against it
		}
		settings = append(settings, grpc.WithTransportCredentials(files))
	} else {
		settings = append(settings, grpc.WithTransportCredentials(insecure.NewCredentials()))
	}
	if place.proxied != "" {
		client.proxy = newProxy(place.proxied)
		if _, err := client.proxy.process(ctx); err != nil {
			return nil, err
		}
		place.target = "passthrough:///localhost"
		settings = append(settings,
			// Next to the wire: each attempt is explained.
			grpc.WithChainUnaryInterceptor(client.proxy.explainUnary),
			grpc.WithChainStreamInterceptor(client.proxy.explainStream),
			grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
				return client.proxy.dial(ctx)
			}),
		)
	}
	client.conn, err = grpc.NewClient(place.target, append(settings, plan.grpc...)...)
	if err != nil {
		_ = client.Close()
		return nil, err
	}
	client.Services = newServices(client)
	return client, nil
}

func (p *dialPlan) find() (Context, error) {
	var where Context
	var err error
	switch {
	case p.where != nil:
		where = *p.where
		where.Credentials = environmentCredentials()
	case p.context != "":
		where, err = namedContext(p.context)
	default:
		where, err = findContext()
	}
	if p.files != nil {
		where.Credentials = *p.files
	}
	return where, err
}

// Conn returns the connection, for stubs of other services. Calls through it are treated alike.
func (c *Client) Conn() grpc.ClientConnInterface { return c.conn }

// WaitReady returns when the fleet has answered a call, or, when ctx ends, with what stood in the way. It waits out lost
// connections; what no waiting mends, such as a certificate that is refused, ends it at once.
func (c *Client) WaitReady(ctx context.Context) error {
	for attempt := 1; ; attempt++ {
		_, err := c.Access.WhoAmI(ctx, &commonv1.WhoAmIRequest{})
		if err == nil || !errors.Is(err, ErrUnavailable) {
			return err
		}
		if ended := sleep(ctx, delay(attempt, 0)); ended != nil {
			return fmt.Errorf("%w: %w", ended, err)
		}
	}
}

// Close ends all calls and the connection.
func (c *Client) Close() error {
	var err error
	if c.conn != nil {
		err = c.conn.Close()
	}
	if c.proxy != nil {
		c.proxy.close()
	}
	return err
}
