// A session of node-postgres: with_pg.js HOST PORT.  It prints what it found, as JSON.

const dns = require('dns')
const { Client } = require('pg')

const [host, port] = process.argv.slice(2)
const looked = []

// Every name is at 127.0.0.1: the name that pg connects to is also the one that it gives to TLS.
dns.lookup = (name, options, done) => {
  looked.push(name)
  process.nextTick(() => options.all ? done(null, [{ address: '127.0.0.1', family: 4 }]) : done(null, '127.0.0.1', 4))
}

async function main() {
  const client = new Client({
    host, port: Number(port), user: 'postgres', database: 'postgres',
    ssl: { rejectUnauthorized: false }, statement_timeout: 300,
  })
  await client.connect()
  const asked = await client.query('select ssl from pg_stat_ssl where pid = pg_backend_pid()')
  const large = await client.query("select repeat('x', $1::int) as row", [1000000])
  let code = null
  try {
    await client.query('select pg_sleep(60)')
  } catch (error) {
    code = error.code
  }
  await client.end()
  console.log(JSON.stringify({ looked, encrypted: asked.rows[0].ssl, large: large.rows[0].row.length, code }))
}

main().catch((error) => {
  console.error(error)
  process.exit(1)
})
